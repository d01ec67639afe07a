"""Whether a store ever makes a first token come later: with and without it, turn by turn, on disks of any speed."""
