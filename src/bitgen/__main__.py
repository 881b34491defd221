"""`python -m bitgen` is the command `bitgen`."""

from bitgen.cli.app import main

if __name__ == "__main__":
    main()
