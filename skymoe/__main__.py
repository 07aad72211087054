"""`python -m skymoe` is `skymoe`."""

from skymoe.cli import main

if __name__ == "__main__":
    main()
