"""The command line as a module: `python -m linsight.tools.main COMMAND`."""

from linsight_command import app as app
from linsight_command import main as main

if __name__ == "__main__":
    main()
