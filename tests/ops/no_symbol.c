/* A shared object that is no op. */
int unrelated(void);

int unrelated(void)
{
    return 0;
}
