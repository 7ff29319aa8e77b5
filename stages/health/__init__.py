"""Health checks: what a check and a finding are, whatever the stage. Each stage has checks of its own."""
