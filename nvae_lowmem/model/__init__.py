"""The network, its likelihoods, its regularisers, and how its blocks keep activations."""
