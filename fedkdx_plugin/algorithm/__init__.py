"""FedKDX of the paper, the parts it shares with FedKD, and this project's additions to both (FedKDX+, FedKD+)."""
