"""`python -m pyshard`."""

from .cli import main

raise SystemExit(main())
