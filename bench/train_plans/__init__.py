"""Training of small models of every layer plan, from the same seeds and text, to compare what they learn."""
