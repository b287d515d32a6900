"""VarCon as a loss of other libraries. Each module needs its host; importing this needs none."""
