"""``python -m uadtool``."""

from uadtool.cli.main import main

main()
