"""`python -m fs3` is the `fs3` command."""

from fs3.cli.main import main

raise SystemExit(main())
