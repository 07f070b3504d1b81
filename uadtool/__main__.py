"""``python -m uadtool``."""

from uadtool.cli import main

main()
