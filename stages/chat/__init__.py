"""A conversation with policies: its turns within the room there is, and answers that appear token by token."""
