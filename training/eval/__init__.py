"""What trained systems are worth: tables of the miniature world, judged exactly (`reasonedit-eval`)."""
