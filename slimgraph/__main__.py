"""`python -m slimgraph` is `slimgraph`."""

from slimgraph.cli import main

if __name__ == "__main__":
    main()
