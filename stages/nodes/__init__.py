"""What a stage does because it runs on several nodes: join, agree on config and folders, and do work once per node."""
