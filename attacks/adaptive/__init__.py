"""Attackers that know how the update was defended."""
