"""The shipped profiles and the table of what trains on which card."""
