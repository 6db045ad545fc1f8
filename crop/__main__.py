"""``python -m crop``."""

from crop.cli import main

raise SystemExit(main())
