"""`python -m tandem.cli` is `tandem`."""

from tandem.cli import main

if __name__ == "__main__":
    main()
