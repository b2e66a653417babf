"""`python -m mainrun` is `mainrun`."""

from mainrun.cli import main

if __name__ == "__main__":
    main()
