"""What a server could have seen: the attacks of an audit, their controls, and the verdict."""
