"""Numbers gone bad: which optimizer steps are not taken, decided and counted on the device."""
