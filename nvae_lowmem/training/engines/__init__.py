"""What runs a step: plain torch or DeepSpeed, states on the card or on the host, one process or several."""
