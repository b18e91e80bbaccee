"""What a container may reach: slots, firewall, policies, and the egress proxy."""
