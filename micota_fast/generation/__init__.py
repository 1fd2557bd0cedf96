"""Requests to servers, and a store that loses none of their answers."""
