"""`align chat`: the terminal's side of a conversation."""
