"""`align sweep`: trials of a chain or a stage that differ in some fields, stopped early where they are bad, kept in one study."""
