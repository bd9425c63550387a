"""python -m muenfast"""

import sys

from muenfast.cli import main

sys.exit(main())
