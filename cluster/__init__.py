"""Where it runs: the command line, the local launcher, manifests."""
