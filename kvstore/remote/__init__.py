"""What hosts share: lookups that nobody waits long for, reads and writes in threads of their own, and a breaker."""
