"""Run the command line: python -m pyggml_adapt."""

import sys

from pyggml_adapt.cli.main import main

sys.exit(main())
