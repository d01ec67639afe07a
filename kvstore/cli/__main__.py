"""``python -m kvstore.cli``: the script ``kvstore``, where it is not on the path."""

from kvstore.cli import main

main()
