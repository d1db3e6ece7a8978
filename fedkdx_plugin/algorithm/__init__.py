"""FedKDX of the paper, what it shares with FedKD, and what this project adds to both (FedKDX+, FedKD+)."""
