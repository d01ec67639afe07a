"""Workers of one host, or of several, that continue each other's conversations."""
