"""What training would see and cost, before hours are spent."""
