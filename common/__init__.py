"""What the stages share; every arrow points down."""
