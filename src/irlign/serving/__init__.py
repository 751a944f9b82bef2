"""What stands behind the server: the protocol's words, requests worked on together, answers selected as the run selects them."""
