"""`python -m blemish`, and `torchrun ... -m blemish`: the command, by whatever starts modules."""

from blemish import main

main()
