"""`python -m irlign VERB`."""

from irlign.cli import main

main()
