"""How close reconstructions come to the truth. The only code that opens the truth files."""
