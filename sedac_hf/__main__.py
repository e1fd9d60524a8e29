"""`python -m sedac_hf` is the `sedac` command."""

from sedac_hf.cli import main

if __name__ == "__main__":
    main()
