"""Where everything lies: the flat buffers, their plan, and how they are saved; no arithmetic."""
