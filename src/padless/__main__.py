"""`python -m padless`: the command line, where its script is not on the path."""

from padless.cli import main

if __name__ == "__main__":
    main()
