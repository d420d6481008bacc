"""Privacy/utility sweeps: many studies of one task in one compiled program."""
