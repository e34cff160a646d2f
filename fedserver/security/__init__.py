"""Who may speak to the server: the certificate authority, enrolment tokens and the check of every call."""
