"""Run the command line with `python -m mainrun`."""

from mainrun.cli import main

if __name__ == "__main__":
    main()
