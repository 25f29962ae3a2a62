"""One class a kind of stage; the module's name is the kind's."""
