"""What the shipped chains of real models need beside the stages: how their data is made and what counts as gold."""
