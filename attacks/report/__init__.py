"""Reads run directories and builds the page that shows what an attack recovered."""
