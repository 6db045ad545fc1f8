"""``python -m crop``."""

from crop.cli.main import main

raise SystemExit(main())
