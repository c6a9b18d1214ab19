"""One job a file: takes one config and wires the rooms together. Nothing else wires."""
