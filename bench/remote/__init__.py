"""What a Redis behind a bad network costs: loads beyond their deadlines, matches, and the throughput of a replay."""
